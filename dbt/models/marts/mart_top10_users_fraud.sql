with

by_user as (

    select
        user_id,
        fraud_orders,
        fraud_amount
    from {{ ref('orders_by_user') }}
    where created_day is null and fraud_orders > 0

),

users as (

    select * from {{ ref('dim_users') }}

),

top_10 as (

    select
        row_number() over (order by fraud_orders desc, user_id) as user_rank,
        *
    from by_user
    qualify user_rank <= 10

),

main_reasons as (

    select
        user_id,
        reason as main_reason
    from {{ ref('reasons_by_user') }}
    where created_day is null
    qualify row_number() over (partition by user_id order by fraud_orders desc, reason) = 1

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
