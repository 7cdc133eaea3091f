with

fraud_orders as (

    select * from {{ ref('fct_orders') }}
    where is_fraud

),

users as (

    select * from {{ ref('dim_users') }}

),

by_user as (

    select
        user_id,
        count(*) as fraud_orders,
        sum({{ wide('amount_numeric') }}) as fraud_amount
    from fraud_orders
    group by user_id

),

top_10 as (

    select
        row_number() over (order by fraud_orders desc, user_id) as user_rank,
        *
    from by_user
    qualify user_rank <= 10

),

reasons_by_user as (

    select
        fraud_orders.user_id,
        reason,
        count(*) as orders
    from fraud_orders
    cross join unnest(fraud_orders.reasons) as reason
    group by fraud_orders.user_id, reason

),

main_reasons as (

    select
        user_id,
        reason as main_reason
    from reasons_by_user
    qualify row_number() over (partition by user_id order by orders desc, reason) = 1

),

final as (

    select
        top_10.user_rank,
        top_10.user_id,
        users.name,
        top_10.fraud_orders,
        top_10.fraud_amount,
        main_reasons.main_reason
    from top_10
    left join users on top_10.user_id = users.user_id
    left join main_reasons on top_10.user_id = main_reasons.user_id

)

select * from final
