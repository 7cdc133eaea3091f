with

by_day as (

    select * from {{ ref('hits_by_day') }}

),

weekly as (

    select
        {{ monday_of('order_date') }} as week,
        rule,
        sum(hits) as hits,
        sum(reviewed) as reviewed,
        sum(confirmed) as confirmed,
        sum(saved_amount) as saved_amount,
        sum(wrongly_held_amount) as wrongly_held_amount
    from by_day
    group by week, rule

),

final as (

    select
        week,
        rule,
        hits,
        reviewed,
        confirmed,
        if(reviewed >= {{ var('least_reviewed') }}, cast(confirmed as float64) / reviewed, null) as precision_of_reviewed,
        saved_amount,
        wrongly_held_amount
    from weekly

)

select * from final
