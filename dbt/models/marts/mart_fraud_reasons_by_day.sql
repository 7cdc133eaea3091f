with

by_day as (

    select * from {{ ref('hits_by_day') }}

),

final as (

    select
        order_date,
        rule as reason,
        sum(hits) as orders,
        sum(amount) as amount
    from by_day
    group by order_date, reason

)

select * from final
